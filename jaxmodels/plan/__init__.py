"""What a job needs, counted before it runs."""
