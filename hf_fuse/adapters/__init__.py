"""Mixtures of low-rank experts on a frozen base model, as PEFT adapters."""
