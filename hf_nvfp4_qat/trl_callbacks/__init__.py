"""How a TRL user switches NVFP4 rollouts on."""
