"""What the commands `list`, `evaluate`, `inspect`, `generate`, `export` and `merge` do with runs and adapters."""
