"""The style sheet and the script of the site, which are written into its page."""
