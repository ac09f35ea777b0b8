"""Run folders: what is in them, a table of them, and a page of their curves beside each other."""
