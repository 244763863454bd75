"""Two QEMUs compared before anything moves."""
