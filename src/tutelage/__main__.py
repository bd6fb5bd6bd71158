"""`python -m tutelage`: the same command, for torch.distributed.run and machines without the script on PATH."""

from tutelage.cli import main

if __name__ == "__main__":
    main()
