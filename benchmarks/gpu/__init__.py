"""fedloom against Hugging Face's Trainer with PEFT on one GPU, and LoRA's two products: see README.md."""
