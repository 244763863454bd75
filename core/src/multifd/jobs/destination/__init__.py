"""`receive`: the destination of a migration."""
