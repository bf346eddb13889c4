"""Check in minutes, on one GPU, what CPUs cannot show: right numbers, memory, seconds, and which kernels work."""
