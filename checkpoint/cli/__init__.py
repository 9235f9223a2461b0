"""The console command `checkpoint`."""
