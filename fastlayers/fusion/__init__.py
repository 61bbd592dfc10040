"""Which neighbouring layers run as one call: in a Sequential (plan.py), and in any model's forward (trace.py)."""
