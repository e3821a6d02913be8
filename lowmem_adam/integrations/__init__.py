"""What DeepSpeed, accelerate and transformers need beside the optimizer; each module says when to import it."""
