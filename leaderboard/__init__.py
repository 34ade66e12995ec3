"""What is published: outcome tables, records, their statistics and ranking, and the static site made from them.

A record carries its track's frozen content, so this package needs nothing of the rest: it imports the errors alone.
"""
