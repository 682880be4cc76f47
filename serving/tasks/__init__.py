"""Task files for lm-evaluation-harness whose data is local: `lm-eval --include_path` takes them."""
