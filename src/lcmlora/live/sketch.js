// Runs once, in the frame of the sketch: a canvas to draw on with a mouse, a pen or a finger.
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d");
const colours = element.querySelector(".colours"), size = element.querySelector("input[type=range]");
const ask = () => window.lcmloraLive?.ask();
let colour = "", last = null, before = [];

const clear = () => { pen.fillStyle = "#fff"; pen.fillRect(0, 0, canvas.width, canvas.height); };
const keep = () => { before.push(pen.getImageData(0, 0, canvas.width, canvas.height)); before = before.slice(-20); };
const choose = (button) => {
  colour = button.dataset.colour;
  colours.querySelectorAll("button").forEach((one) => one.setAttribute("aria-pressed", one === button));
};
const place = (event) => {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
};
const line = (event) => {
  const here = place(event);
  pen.strokeStyle = colour;
  pen.lineWidth = size.value * canvas.width / 256;
  pen.lineCap = "round";
  pen.beginPath();
  pen.moveTo(...last);
  pen.lineTo(...here);
  pen.stroke();
  last = here;
  ask();
};

clear();
choose(colours.querySelector("button"));
colours.addEventListener("click", (event) => event.target.dataset.colour && choose(event.target));
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  keep();
  last = place(event);
  line(event);
});
canvas.addEventListener("pointermove", (event) => last && line(event));
for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { last = null; });
element.querySelector(".undo").addEventListener("click", () => {
  if (before.length) pen.putImageData(before.pop(), 0, 0);
  ask();
});
element.querySelector(".clear").addEventListener("click", () => { keep(); clear(); ask(); });
