"""Moving blocks from P's KV store into D's: one interface, several transports."""
