"""Replicas with clients and front ends, in simulated time."""
