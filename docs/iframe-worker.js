/* The search in pages that are opened as files, where browsers start no workers: the worker's script runs in a hidden frame instead.
   The theme's plugin for such pages would fetch a script for this; one of this name (mkdocs.yml) keeps it from that. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.documentElement.append(frame);
      this.waiting = [];
      const inside = frame.contentWindow;
      // What the script says goes to the page, and what the page says to the script, once it listens.
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
      inside.importScripts = () => { throw new Error("no further scripts in pages that are opened as files"); };
      const script = frame.contentDocument.createElement("script");
      script.src = new URL(url, document.baseURI);
      script.onload = () => {
        this.say = data => inside.dispatchEvent(new inside.MessageEvent("message", { data }));
        this.waiting.forEach(this.say);
      };
      script.onerror = () => this.dispatchEvent(new Event("error"));
      frame.contentDocument.head.append(script);
    }

    postMessage(data) {
      if (this.say) this.say(data);
      else this.waiting.push(data);
    }
  };
}
