"""Place windows and blend their logits."""
