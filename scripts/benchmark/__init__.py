"""What checkpointing costs a training loop, here and in other frameworks, on the same machine.

`scripts/bench` runs it. Each measurement is made in a process of its own, which also measures what
the hardware can do (`limits`), with as many bytes. What counts are the ratios of the two within one
process; the medians of several rounds, and their spread, are printed. Words:

stall           seconds from the call that saves to when training may go on
durable         seconds from that call to when the framework says that all is written. Only some
                sync to the disk before they say so; the table tells which
memcpy          seconds to copy as many bytes from memory to memory that was touched before, in
                blocks of 16 MiB; stream: in one, which the processor writes past its caches
disk write      seconds to write as many bytes to a new file and to sync it, buffered or direct,
                whichever is faster; disk read: to read them directly
training lost   what a training loop in the same process took longer while a save was in flight,
                stall included
memory          peak of the resident memory above what was there before the first save or restore
changed         what changed since the save before, as a share of the state

All times are without those in which the thread that measures waited for a core.
"""
