"""LoRAs in files: by the names that diffusers, kohya's scripts and ComfyUI read, and back."""
