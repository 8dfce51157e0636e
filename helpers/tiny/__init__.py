"""The embedded default: drawn food packages and a tiny Qwen2-VL, so that everything runs without the hub."""
