"""DeepSpeed, ranks and collectives, averages of weights, the device."""
