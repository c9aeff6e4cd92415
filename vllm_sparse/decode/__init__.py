"""Decode: budgets of KV heads, and what watches the choice of pages."""
