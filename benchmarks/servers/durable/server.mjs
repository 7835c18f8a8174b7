// The Durable Streams server for Node, in memory. Its argument is JSON: {"rate": 50, "size": 100}.
//
// Whoever creates a stream (PUT, text/plain, .../MILLISECONDS) gets, so much later, `rate` events a second of `size`
// bytes in it, each with the time at which it was made, until the stream is deleted. They are appended in the server's
// own process and not with a POST for each: that saves it work, and time between an event's making and its first byte.

import { setImmediate as others, setTimeout as sleep } from "node:timers/promises"

import { DurableStreamTestServer } from "@durable-streams/server"

const { rate, size } = JSON.parse(process.argv[2])
const gone = new Set()

async function append({ path }) {
  const began = performance.now() + Number(path.split("/").at(-1))
  for (let number = 0; ; number++) {
    await others() // or timers that are late would follow each other, and nobody's request be read
    await sleep(Math.max(0, began + (number * 1000) / rate - performance.now()))
    if (gone.delete(path)) return
    const mark = `t=${process.hrtime.bigint()};`
    server.store.append(path, Buffer.from(mark.padEnd(size, "x")), { contentType: "text/plain" })
  }
}

const server = new DurableStreamTestServer({
  port: 0,
  onStreamCreated: (event) => void append(event),
  onStreamDeleted: ({ path }) => void gone.add(path),
})
process.on("SIGTERM", () => process.exit())
console.log(await server.start())
