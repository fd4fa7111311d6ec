"""What is asked: a scenario file, and the deployment that it means."""
