// One HTTP request through a SOCKS proxy with npm's `socks`, and its UDP ASSOCIATE and BIND:
//   node fetch.js connect|associate|bind PROXY_HOST PROXY_PORT TYPE USER PASSWORD HOST PORT
import dgram from "node:dgram";
import net from "node:net";
import { SocksClient } from "socks";

const [command, host, port, type, userId, password, targetHost, targetPort] = process.argv.slice(2);
const options = {
  proxy: { host, port: Number(port), type: Number(type), userId: userId || undefined, password: password || undefined },
  destination: { host: targetHost, port: Number(targetPort) },
  command,
};

if (command === "connect") {
  const { socket } = await SocksClient.createConnection(options);
  socket.write(`GET / HTTP/1.0\r\nHost: ${targetHost}\r\n\r\n`);
  socket.pipe(process.stdout);
} else if (command === "associate") {
  const client = new SocksClient({ ...options, destination: { host: net.isIPv6(host) ? "::" : "0.0.0.0", port: 0 } });
  client.on("established", ({ socket, remoteHost }) => {
    const udp = dgram.createSocket(net.isIPv6(host) ? "udp6" : "udp4");
    udp.on("message", (message) => {
      process.stdout.write(SocksClient.parseUDPFrame(message).data);
      udp.close();
      socket.destroy();
    });
    const data = Buffer.from("datagram from npm");
    const frame = SocksClient.createUDPFrame({ remoteHost: { host: targetHost, port: Number(targetPort) }, data });
    udp.send(frame, remoteHost.port, remoteHost.host);
  });
  client.connect();
} else {
  const client = new SocksClient(options);
  client.on("bound", ({ remoteHost }) => process.stdout.write(`${remoteHost.host} ${remoteHost.port}\n`));
  client.on("established", ({ socket }) => socket.pipe(process.stdout));
  client.connect();
}
