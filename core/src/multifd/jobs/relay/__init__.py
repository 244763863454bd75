"""`relay`: the server, its migrations, their channels."""
