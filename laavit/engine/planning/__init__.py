"""What a recipe takes: its models as shapes, its passes on them, how they spread over processes, and how fast."""
