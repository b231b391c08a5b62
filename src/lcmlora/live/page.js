// Runs once, in the frame of the accelerated picture: `element` is that frame, `trigger` asks for a new picture.
const of = (name) => document.querySelector(name);
const GRACE = 120; // milliseconds after the last change, where a picture takes longer than that
let timer = 0;

const live = {
  // Whatever was changed: ask for its picture, soon.
  ask() {
    const last = of("#live-fast figure");
    clearTimeout(timer);
    timer = setTimeout(() => trigger("input"), last && last.dataset.seconds * 1000 > GRACE ? GRACE : 0);
  },
  // As the wish goes out: mark the picture that is waited for, and send the sketch along where one is drawn.
  collect(values, frame) {
    of(`${frame} figure`)?.classList.add("busy");
    values[values.length - 1] = live.drawing() ? of("#live-sketch canvas").toDataURL("image/webp", 0.9) : "";
    return values;
  },
  drawing: () => of("#live").dataset.mode === "draw",
  mode(name) {
    of("#live").dataset.mode = name;
    live.ask();
  },
  // After a picture: mark the base's where it is of something else, and say how many times faster.
  settle() {
    const base = of("#live-base figure"), fast = of("#live-fast figure");
    if (!base || !fast || live.drawing()) return;
    const same = base.dataset.key === fast.dataset.key;
    base.classList.toggle("busy", !same);
    const times = base.dataset.seconds / fast.dataset.seconds;
    const word = times >= 1.05 ? `${times >= 10 ? Math.round(times) : times.toFixed(1)}× faster` : "";
    fast.querySelector(".times").textContent = same && isFinite(times) ? word : "";
  },
};
window.lcmloraLive = live;
