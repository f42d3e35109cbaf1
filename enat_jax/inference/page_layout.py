"""The layout of the page of ``python -m enat_jax.demo``: Gradio's components around ``page.py``.

Nothing on the page comes from, or goes to, another machine: see ``serve``.
"""

import contextlib
import os
import pathlib
import random
from collections.abc import Iterator
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported, which reads it

import gradio as gr  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.types import ASGIApp, Message, Receive, Scope, Send  # noqa: E402

from enat_jax.data import decoding  # noqa: E402
from enat_jax.inference import image_directory  # noqa: E402
from enat_jax.inference import page as pages  # noqa: E402
from enat_jax.runtime import exits  # noqa: E402

PAINT = "#ff8000"  # the colour of ``reveal_pictures.OUTLINE``
SMALL = 128  # pixels; of smaller pictures the page shows the single pixels
CSS = """
.pixels img { image-rendering: pixelated; }
:is(#pictures, #editor) .wrap:has(.error) { display: none; }  /* it would hide the pictures */
footer { display: none !important; }
"""
# What a browser may load for the page: what this program serves, and nothing else.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; "
    "form-action 'self'"
)
COMPILING = "Drawing; a new number of steps or pictures is compiled first"
QUIET: dict[str, Any] = dict(api_visibility="private", show_progress="minimal")


class Locked:
    """Adds the policy to all answers (an application of ASGI around another one)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message.get("headers", []), header]}
            await send(message)

        await self._app(scope, receive, with_policy)


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """Shows mistakes as one sentence on the page; bugs stay tracebacks in the terminal."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        text = exits.no_package(error) or exits.one_line(error)
        raise gr.Error(text, duration=20, print_exception=False) from None


def slider(of: pages.Range, **how: Any) -> gr.Slider:
    """Returns a slider whose number ``of`` checks: Gradio's sentence would not name it."""
    found: Any = gr.Slider(of.low, of.high, of.start, step=of.step, label=of.name, **how)
    found.preprocess = lambda payload: payload
    return found


class Layout:
    """The components of a page, and what their events do.

    Args:
        page: does the work.
    """

    def __init__(self, page: pages.Page) -> None:
        self.page = page
        model = page.model
        self.size = model.tokenizer.image_size
        self.look = ["pixels"] if min(self.size) < SMALL else []
        self.has_classes, self.has_text = bool(model.class_names), model.text is not None
        height, width = self.size
        kinds = [f"{len(model.class_names):,} classes"] * self.has_classes
        kinds += ["texts"] * self.has_text
        with gr.Blocks(
            title="enat_jax", analytics_enabled=False, delete_cache=(600, 3600)
        ) as self.blocks:
            gr.Markdown(
                f"## enat_jax\nDraws {' and '.join(kinds)} in {width}x{height} pixels, all on this "
                "machine."
            )
            self.files, self.chosen, self.original = gr.State([]), gr.State(0), gr.State(None)
            self.drawn = gr.State(None)  # what is to be shown step by step, if anything
            with gr.Row(equal_height=False):
                with gr.Column(scale=5, min_width=380):
                    with gr.Tabs(selected="draw") as self.tabs:
                        with gr.Tab("Draw", id="draw"):
                            self._draw_tab()
                        with gr.Tab("Fill", id="fill", render_children=True):
                            self._fill_tab()
                    self._settings()
                with gr.Column(scale=6, min_width=380):
                    self._results()
            self._events()

    def _draw_tab(self) -> None:
        choices = self.page.classes()
        some = len(choices) - 1 if len(choices) <= pages.FIRST_CLASSES + 1 else 4
        self.labels = gr.Dropdown(
            choices,
            value=[] if self.has_text else list(range(some)),
            multiselect=True,
            label="Classes",
            visible=self.has_classes,
        )
        self.prompts = gr.Textbox(
            label="Prompts, one on each line",
            info=self.page.words() or None,
            lines=3,
            visible=self.has_text,
        )
        self.num = slider(pages.NUMBER)
        self.steps_shown = gr.Checkbox(True, label="Show step by step how pictures come about")
        self.draw = gr.Button("Draw", variant="primary", elem_id="draw")

    def _fill_tab(self) -> None:
        no_class = self.page.model.model.num_classes
        height, width = self.size
        factor = -(-pages.CANVAS // min(height, width))
        self.upload = gr.UploadButton(
            "Upload a picture", file_types=["image"], size="sm", elem_id="upload"
        )
        self.editor = gr.ImageEditor(
            label="Paint over what is to change",
            sources=(),
            transforms=(),
            layers=False,
            brush=gr.Brush(
                default_size=factor * max(1, height // 12), colors=[PAINT], color_mode="fixed"
            ),
            eraser=gr.Eraser(default_size=factor * max(1, height // 12)),
            canvas_size=(width * factor, height * factor),
            fixed_canvas=True,
            format="png",
            buttons=[],
            height=pages.CANVAS + 96,
            placeholder="Upload a picture, or draw some and paint over one of them",
            elem_id="editor",
        )
        self.label = gr.Dropdown(
            [("any: what is kept decides", no_class), *self.page.classes()[:-1]],
            value=no_class,
            label="Class of what is filled in",
            elem_id="label",
            visible=self.has_classes,
        )
        self.prompt = gr.Textbox(
            label="Prompt, or nothing: what is kept decides", lines=1, visible=self.has_text
        )
        self.fills = slider(pages.FILLS)
        with gr.Accordion("Edges", open=False):
            self.grow, self.blend = slider(pages.GROW), slider(pages.BLEND)
        self.fill = gr.Button("Fill", variant="primary", elem_id="fill")

    def _settings(self) -> None:
        with gr.Accordion("Settings", open=True):
            self.new_seed = gr.Button("New seed", size="sm")
            self.seed = gr.Number(
                pages.SEED.start, label="Seed", buttons=[self.new_seed], elem_id="seed"
            )
            with gr.Row():
                self.sliders = {
                    name: slider(of, elem_id=name, min_width=200, buttons=["reset"])
                    for name, of in self.page.ranges().items()
                }
            self.negative = gr.Textbox(
                label="Negative prompt: what guidance leads away from", visible=self.has_text
            )

    def _results(self) -> None:
        self.gallery = gr.Gallery(
            label="Pictures",
            show_label=False,
            columns=5,
            object_fit="contain",
            buttons=["download", "fullscreen"],
            elem_id="pictures",
            elem_classes=self.look,
            interactive=False,
        )
        with gr.Row():
            self.paint = gr.Button("Paint over the chosen picture", size="sm", elem_id="paint")
            self.download = gr.DownloadButton(
                "Download all, with their settings inside",
                size="sm",
                interactive=False,
                elem_id="download",
            )
        self.animation = gr.Image(
            label="Step by step",
            visible=False,
            buttons=["download"],
            elem_id="animation",
            elem_classes=self.look,
        )
        self.strip = gr.Image(
            label="Revealed and guessed",
            visible=False,
            buttons=["download", "fullscreen"],
            elem_id="strip",
        )

    def _events(self) -> None:
        one: dict[str, Any] = dict(concurrency_id="model", concurrency_limit=1, **QUIET)
        one |= {"show_progress": "full", "show_progress_on": self.gallery}
        shown = [self.gallery, self.files, self.chosen, self.download, self.drawn]
        steps = [self.animation, self.strip]
        common = {self.seed, self.negative, *self.sliders.values()}
        drawn = gr.on(
            [self.draw.click, self.prompts.submit],
            self._on_draw,
            {self.labels, self.prompts, self.num, self.steps_shown, *common},
            shown,
            **one,
        )
        drawn.success(self._on_drawn, self.drawn, steps, **one | {"show_progress_on": steps})
        gr.on(
            [self.fill.click, self.prompt.submit],
            self._on_fill,
            {self.original, self.editor, self.label, self.prompt, self.fills, self.grow, self.blend}
            | common,
            shown,
            **one,
        ).success(self._on_drawn, self.drawn, steps, **QUIET)
        self.new_seed.click(lambda: random.randrange(pages.MAX_SEED + 1), None, self.seed, **QUIET)
        opened = [self.original, self.editor, self.tabs]
        # One after the other: what was chosen before the button was pressed is painted over.
        ordered: dict[str, Any] = dict(concurrency_id="choice", concurrency_limit=1, **QUIET)
        self.gallery.select(self._on_select, None, self.chosen, **ordered)
        self.paint.click(self._on_paint, [self.files, self.chosen], opened, **ordered)
        self.upload.upload(self._on_upload, self.upload, opened, **QUIET)

    def _settings_of(self, values: dict[Any, Any]) -> dict[str, Any]:
        return {name: values[of] for name, of in self.sliders.items()}

    def _on_draw(
        self,
        values: dict[Any, Any],
        progress: gr.Progress = gr.Progress(),  # noqa: B008  Gradio finds it by its default
    ) -> Iterator[tuple[Any, ...]]:
        with sentences():
            images = self.page.drawn(
                values[self.labels] or [],
                values[self.prompts] or "",
                values[self.negative] or "",
                values[self.num],
                values[self.seed],
                self._settings_of(values),
            )
            progress((0, len(images)), COMPILING, unit="pictures")
            for paths in self.page.draw(images):
                progress((len(paths), len(images)), "Drawing", unit="pictures")
                yield *self._shown(paths), images if values[self.steps_shown] else None

    def _on_drawn(self, images: image_directory.Images | None) -> tuple[Any, ...]:
        if images is None:
            return gr.Image(None, visible=False), gr.Image(None, visible=False)
        with sentences():
            animation, strip = map(str, self.page.reveal(images))
            return gr.Image(animation, visible=True), gr.Image(strip, visible=True)

    def _on_fill(
        self,
        values: dict[Any, Any],
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[tuple[Any, ...]]:
        with sentences():
            editor = values[self.editor] or {}
            images = self.page.filled(
                values[self.original] if editor.get("background") is not None else None,
                pages.painted(editor.get("layers") or [], self.size),
                values[self.label],
                values[self.prompt] or "",
                values[self.negative] or "",
                values[self.fills],
                values[self.seed],
                self._settings_of(values),
                values[self.grow],
                values[self.blend],
            )
            progress((0, len(images)), COMPILING, unit="pictures")
            for paths in self.page.draw(images):
                yield *self._shown(paths), None

    def _shown(self, paths: list[pathlib.Path]) -> tuple[Any, ...]:
        """Returns what the page shows of these files, without ``drawn``."""
        names = [str(path) for path in paths]
        archive = gr.DownloadButton(value=str(pages.zipped(paths)), interactive=True)
        gallery = gr.Gallery(names, columns=3 if len(names) <= 6 else 5, selected_index=None)
        return gallery, names, 0, archive

    def _on_select(self, event: gr.SelectData) -> int:
        return event.index

    def _on_paint(self, files: list[str], chosen: int) -> tuple[Any, ...]:
        with sentences():
            if not files:
                raise ValueError("Draw some pictures first")
            return self._opened(files[chosen])

    def _on_upload(self, path: str) -> tuple[Any, ...]:
        with sentences():
            return self._opened(path)

    def _opened(self, path: str) -> tuple[Any, ...]:
        picture = self.page.read(pathlib.Path(path))
        large = pages.enlarged(picture.pixels)
        blank = {"background": large, "layers": [], "composite": large}
        return picture, blank, gr.Tabs(selected="fill")


def serve(page: pages.Page, host: str, port: int | None) -> tuple[gr.Blocks, str]:
    """Starts a server of the page, and returns the page and its address.

    Of Gradio there are off: usage statistics and the question for newer versions, public links,
    the list of functions for other programs, the history of runs, monitoring, the server for
    agents, the renderer by Node and the fonts of others. Browsers are told to load nothing from
    elsewhere (``POLICY``). Clicks wait for each other.

    Args:
        page: does the work.
        host: address to listen at, such as 127.0.0.1, which no other machine reaches.
        port: None: the first free one from 7860.

    Raises:
        OSError: there is no free port.
    """
    blocks = Layout(page).blocks
    blocks.queue(max_size=20, api_open=False)
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        inbrowser=False,
        share=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        num_workers=0,
        root_path="",
        allowed_paths=[],
        max_file_size=decoding.MAX_BYTES,
        strict_cors=True,
        app_kwargs={"middleware": [Middleware(Locked)]},
        theme=gr.themes.Default(
            primary_hue="orange",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
        css=CSS,
    )
    return blocks, address
