"""What the samplers of web UIs and k-diffusion are called here: "DPM++ 2M Karras", `dpmpp_2m_sde`."""

from __future__ import annotations

OURS = {
    "euler": "euler",
    "euler a": "euler-a",
    "heun": "heun",
    "dpm2": "dpm2",
    "dpm2 a": "dpm2-a",
    "dpm++ 2m": "dpm++2m",
    "dpm++ 2m sde": "dpm++2m-sde",
    "dpm++ 3m sde": "dpm++2m-sde:order=3",
    "dpm++ 2s": "dpm++2s",
    "dpm++ 2s a": "dpm++2s",
    "dpm++ sde": "dpm++2s:sde",
    "lms": "lms",
    "plms": "pndm",
    "ddim": "ddim",
    "ddpm": "ddpm",
    "deis": "deis",
    "unipc": "unipc",
    "uni pc": "unipc",
    "uni pc bh2": "unipc",
    "lcm": "lcm",
    "tcd": "tcd",
    "sa solver": "sa-solver",
}
"""For ancestral 2S and SDE, which no table holds, the nearest that one does."""
SCHEDULES = {
    "karras": "karras",
    "exponential": "exponential",
    "beta": "beta",
    "sgm uniform": "spacing=trailing",
    "simple": "spacing=trailing",
    "uniform": "",
    "normal": "",
    "automatic": "",
}


def ours(name: str) -> str | None:
    """Our spec for a web UI's name, which may end in that of a schedule of sigmas; None where there is none."""
    words = name.lower().replace("_", " ").replace("dpmpp", "dpm++").replace("dpm 2", "dpm2")
    text = " ".join(words.replace("ancestral", "a").replace("++2", "++ 2").replace("++3", "++ 3").split())
    for schedule, option in {"": "", **SCHEDULES}.items():
        known = OURS.get(text.removesuffix(schedule).strip()) if text.endswith(schedule) else None
        if known is not None:
            return f"{known}{',' if ':' in known else ':'}{option}" if option else known
    return None
