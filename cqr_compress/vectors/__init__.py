"""Word vectors from compressed files, with numpy and safetensors alone."""
