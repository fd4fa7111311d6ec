"""Ready-to-run scenarios, their reported tables, and the shipped profiles."""
