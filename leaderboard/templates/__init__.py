"""The Jinja templates of the site."""
