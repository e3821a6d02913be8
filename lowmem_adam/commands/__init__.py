"""The commands of ``lowmem-adam``, a module each; ``lowmem_adam.cli`` puts them together."""
