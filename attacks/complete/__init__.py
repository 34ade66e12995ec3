"""Complete verification: a proof or a counter-example for what attacks and incomplete bounds leave open."""
