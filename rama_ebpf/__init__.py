"""rama_ebpf: the kernel decides who may connect before ``accept(2)``, Python services handle those who got in."""

__version__ = "0.1.0"
