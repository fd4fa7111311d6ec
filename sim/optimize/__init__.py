"""The cheapest deployment for a rate and its objectives."""
