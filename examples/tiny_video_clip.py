"""A real mp4 from end to end: a generated clip is encoded with PyAV, read by torchcodec and by PyAV, and asked about through a packed cache.

    pip install "bitsandheads[video]"
    python examples/tiny_video_clip.py --plan balanced --file clip.mp4

Uses the tiny video model of this repository; any video model and file go the same way (docs/video.md).
"""

import argparse
from pathlib import Path

import av
from torch import Tensor

from bitsandheads import video
from bitsandheads.tasks import video as clips

MODEL = Path(__file__).resolve().parent.parent / "models" / "tiny-video"


def write_mp4(path: Path, frames: Tensor) -> None:
    """Encode frames uint8 [T, 3, height, width] without loss, 8 in a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=8)
        stream.height, stream.width = frames.shape[2:]
        stream.pix_fmt, stream.options = "rgb24", {"crf": "0", "qp": "0"}
        for frame in frames.permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def main() -> int:
    """Ask; returns the number of right answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", default="balanced")
    parser.add_argument("--file", type=Path, default=Path("clip.mp4"), help="the clip is written here")
    parser.add_argument("--readers", nargs="+", default=["torchcodec", "pyav"])
    args = parser.parse_args()
    samples = [s for s in clips.samples(16) if s.clip == next(clips.samples(1)).clip]
    write_mp4(args.file, clips.frames_of(samples[:1])[0])
    model, processor = video.load(str(MODEL))
    right = 0
    for reader in args.readers:
        session = video.Session(model, processor, plan=args.plan)
        for i, sample in enumerate(samples):
            files = [args.file] if i == 0 else []  # later questions are further turns: the clip is in the cache
            answer = session.ask(sample.prompt, videos=files, frames=32, reader=reader, packed_question=i == 0, max_new_tokens=3)
            right += int(clips.score(sample, answer.text))
            print(
                f"{reader:10} {sample.prompt} {answer.text} ({sample.answer}); {answer.bits_per_element:.2f} bits, {answer.cache_bytes} bytes"
            )
    return right


if __name__ == "__main__":
    main()
