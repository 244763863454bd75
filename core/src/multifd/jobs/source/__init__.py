"""`send`: the source of a migration."""
