"""
--device and --dtype: where a script computes, and in which floats.

Random numbers are drawn on the CPU whatever the device: the same seed gives the same data everywhere.
"""
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_device(parser, of="of the model's weights", dtypes=tuple(DTYPES)):
    """Give a parser the options --device and --dtype; `of` says what has that dtype."""
    parser.add_argument("--device", default="cpu", help="where it computes: cpu, cuda or mps")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help=of)


def device_of(args):
    """(torch.device, torch.dtype) of these options. Raises ValueError where this machine has no such device."""
    try:
        float(torch.zeros(1, device=args.device, dtype=DTYPES[args.dtype]))  # reading it back: "meta" has no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {args.device}: {str(error).strip().splitlines()[0]}") from None
    return torch.device(args.device), DTYPES[args.dtype]
