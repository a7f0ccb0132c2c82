"""PostgreSQL: fences, fenced transactions, and the schema they need."""
