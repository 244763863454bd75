"""What multifd is for: one module a job."""
