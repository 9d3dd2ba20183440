"""What the commands are built on. No model lives here, and nothing here imports a command.

    cli           UserError, exit statuses, a dataclass as command-line flags
    files         files that appear whole or not at all, full disks, hashes
    ranks         which ranks take part, and what they agree on
    heartbeat     which of them are alive
    device        where a run computes: device, dtype, determinism, compile cache
    signals       what stops it
    threads       how many cores it may use, pools of threads
    runtime       these as one object, `rt`
    machine       facts about hardware: peak FLOP/s, memory, compilers
    tokenizer     a tokenizer as a value: GPT-2's, or a byte-level tokenizer.json
    shards        token files, their sequences and the order of the data
    fingerprints  whether the data is what it was
    folders       what lies in a folder of data: one walk, one rule
    documents     files of text, read in batches
    hub           data sets of the Hugging Face Hub
    text          text -> batches -> tokens -> shards, with a manifest
    checkpoint    one checkpoint's whole life: schema, write, verify, find, prune, resume
    code          the run's code: commit, copy, what was not committed
    fit           what fits: rows in a micro-batch, updates in a given time
    plan          what a run is going to do: presets, resume, data, batch arithmetic, warnings
    readahead     batches of sequences, read in threads before they are asked for
    samples       text samples of a run
    rows          the rows of a log, declared once: read, trimmed, shown
    runlog        what a run says: console, files, tracker, export, last words
    commands      the commands that messages tell users to run, by paths that work where they are
    rundir        the log folder: lock, archive
    stats         whether two groups of numbers differ
    profile       some updates under torch.profiler
"""
