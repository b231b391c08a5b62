// Runs once, in the frame of the accelerated picture: `element` is that frame, `trigger` asks for a new picture.
const of = (name) => document.querySelector(name);
const GRACE = 120, SLOW = 250; // milliseconds after the last change, where a picture takes longer than SLOW
let timer = 0, since = null;

const live = {
  // Whatever was changed: ask for its picture, soon.
  ask() {
    const slow = of("#live-fast figure")?.dataset.seconds * 1000 > SLOW, now = performance.now();
    since ??= now;
    clearTimeout(timer);
    const wait = slow ? Math.min(GRACE, since + 2 * GRACE - now) : 0; // who never pauses is not left without pictures
    timer = setTimeout(() => { since = null; trigger("input"); }, wait);
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
