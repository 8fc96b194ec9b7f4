"""How data moves between ranks: collectives, and memory that GPUs of one machine share."""
