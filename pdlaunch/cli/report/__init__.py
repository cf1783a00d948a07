"""Reports as single HTML files, for browsers without a network."""
