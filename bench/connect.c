/*
 * CONNECT set-ups: connect HOST:PORT N SECONDS TARGET-HOST:PORT
 *
 * N at a time: connect to the proxy, CONNECT to the target, one byte there and back, reset. Prints one JSON object.
 * IPv4 only. The target is an echo server (load echo PORT).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_FDS 4096
#define ROOM (1 << 22)

static struct sockaddr_in proxy;
static char request[256];
static int request_size, ep;
static struct client { uint64_t begun; int got, open; char head[1024]; } clients[MAX_FDS];
static uint32_t *lat;
static size_t count, failed;

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void begin(void)
{
	int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	struct linger reset = {1, 0};
	struct epoll_event ev = {.events = EPOLLIN | EPOLLOUT, .data.fd = fd};
	if (fd < 0 || fd >= MAX_FDS) { perror("socket"); exit(1); }
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
	clients[fd] = (struct client){.begun = now_ns()};
	if (connect(fd, (void *)&proxy, sizeof proxy) && errno != EINPROGRESS) { perror("connect"); exit(1); }
	epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev);
}

static void end(int fd, int good)
{
	if (good && count < ROOM) lat[count++] = (now_ns() - clients[fd].begun) / 1000;
	failed += !good;
	close(fd);
	begin();
}

static void ready(int fd, uint32_t events)
{
	struct client *c = &clients[fd];
	if (!c->got && !c->open && events & EPOLLOUT) {
		struct epoll_event ev = {.events = EPOLLIN, .data.fd = fd};
		if (send(fd, request, request_size, MSG_NOSIGNAL) != request_size) { end(fd, 0); return; }
		epoll_ctl(ep, EPOLL_CTL_MOD, fd, &ev);
	}
	if (!(events & ~EPOLLOUT)) return;
	ssize_t r = recv(fd, c->head + c->got, sizeof c->head - 1 - c->got, 0);
	if (r < 0 && errno == EAGAIN) return;
	if (r <= 0) { end(fd, 0); return; }
	if (c->open) { end(fd, 1); return; }
	c->got += r;
	c->head[c->got] = 0;
	if (!strstr(c->head, "\r\n\r\n")) return;
	if (strncmp(c->head, "HTTP/1.", 7) || strncmp(c->head + 9, "200", 3)) { end(fd, 0); return; }
	c->open = 1;
	c->got = 0;
	if (send(fd, "x", 1, MSG_NOSIGNAL) != 1) end(fd, 0);
}

static int by_value(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
	return x < y ? -1 : x > y;
}

int main(int argc, char **argv)
{
	char *colon = argc == 5 ? strchr(argv[1], ':') : 0;
	if (!colon) { fprintf(stderr, "usage: connect HOST:PORT N SECONDS TARGET-HOST:PORT\n"); return 2; }
	*colon = 0;
	proxy = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(atoi(colon + 1))};
	if (inet_pton(AF_INET, argv[1], &proxy.sin_addr) != 1) { fprintf(stderr, "bad address %s\n", argv[1]); return 2; }
	request_size = snprintf(request, sizeof request, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", argv[4], argv[4]);
	lat = malloc(ROOM * sizeof *lat);
	ep = epoll_create1(0);
	uint64_t t0 = now_ns(), stop = t0 + atof(argv[3]) * 1e9, t1 = t0;
	for (int i = 0; i < atoi(argv[2]); i++) begin();
	while (t1 < stop) {
		struct epoll_event evs[256];
		int n = epoll_wait(ep, evs, 256, 100);
		for (int i = 0; i < n; i++) ready(evs[i].data.fd, evs[i].events);
		t1 = now_ns();
	}
	if (!count) { fprintf(stderr, "no tunnel, %zu failures\n", failed); return 1; }
	qsort(lat, count, sizeof *lat, by_value);
	printf("{\"rate\": %.1f, \"p50\": %.3f, \"p99\": %.3f, \"failed\": %zu}\n", count / ((t1 - t0) / 1e9),
	       lat[count / 2] / 1e3, lat[count * 99 / 100] / 1e3, failed);
	return 0;
}
