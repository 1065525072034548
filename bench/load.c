/*
 * Load for the relay benches: cheap enough that the proxy under test is what is measured.
 *
 *   load echo  PORT                          echo server
 *   load sink  PORT                          reads and drops; a connection that sends "G" gets bytes without end
 *   load ping  HOST:PORT N SIZE SECONDS [T]  N tunnels, SIZE-byte ping-pong; prints one JSON object
 *   load pull  HOST:PORT N SECONDS [T]       N tunnels, downloads; prints one JSON object
 *   load push  HOST:PORT N SECONDS [T]       N tunnels, uploads
 *   load hold  HOST:PORT N [T]               opens N tunnels, one echoed byte each, prints "ready", waits for stdin
 *   load dial  HOST:PORT N SECONDS [T]       N at a time: connect, hand-shake, one echoed byte, close; counts
 *
 * T (HOST:PORT) makes it speak SOCKS5 without authentication to HOST:PORT first. IPv4 only.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_FDS 70000
#define BUF (256 * 1024)
static char buf[BUF];
static struct sockaddr_in proxy, target;
static int have_target;

static void die(const char *what) { perror(what); exit(1); }

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static struct sockaddr_in parse(const char *text)
{
	char host[64];
	const char *colon = strrchr(text, ':');
	struct sockaddr_in a = {.sin_family = AF_INET};
	if (!colon || colon - text > 63) { fprintf(stderr, "bad address %s\n", text); exit(2); }
	memcpy(host, text, colon - text);
	host[colon - text] = 0;
	a.sin_port = htons(atoi(colon + 1));
	if (inet_pton(AF_INET, host, &a.sin_addr) != 1) { fprintf(stderr, "bad address %s\n", text); exit(2); }
	return a;
}

static void all(int fd, int writing, char *p, size_t n)
{
	while (n) {
		ssize_t r = writing ? send(fd, p, n, MSG_NOSIGNAL) : recv(fd, p, n, 0);
		if (r < 0 && errno == EINTR) continue;
		if (r <= 0) { fprintf(stderr, "tunnel broke: %s\n", r ? strerror(errno) : "eof"); exit(1); }
		p += r, n -= r;
	}
}

/* A blocking connect and, if asked for, a SOCKS5 hand-shake. */
static int tunnel(void)
{
	int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0) die("socket");
	if (connect(fd, (void *)&proxy, sizeof proxy)) die("connect");
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	if (have_target) {
		char reply[10], request[10] = {5, 1, 0, 1};
		all(fd, 1, "\5\1\0", 3);
		all(fd, 0, reply, 2);
		memcpy(request + 4, &target.sin_addr, 4);
		memcpy(request + 8, &target.sin_port, 2);
		all(fd, 1, request, 10);
		all(fd, 0, reply, 10);
		if (reply[1]) { fprintf(stderr, "socks5 reply %d\n", reply[1]); exit(1); }
	}
	return fd;
}

static int by_value(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
	return x < y ? -1 : x > y;
}

static double cpu(void)
{
	struct rusage u;
	getrusage(RUSAGE_SELF, &u);
	return u.ru_utime.tv_sec + u.ru_stime.tv_sec + (u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static int listen_on(int port)
{
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_ANY)};
	int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(fd, (void *)&a, sizeof a) || listen(fd, 8192)) die("listen");
	return fd;
}

/* Echo holds no backlog of its own: a short write drops the rest only after the peer is known not to read. */
static void serve(int port, int echo)
{
	static char source[MAX_FDS];
	int lfd = listen_on(port), ep = epoll_create1(0), one = 1;
	struct epoll_event ev = {.events = EPOLLIN, .data.fd = lfd}, evs[256];
	epoll_ctl(ep, EPOLL_CTL_ADD, lfd, &ev);
	for (;;) {
		int n = epoll_wait(ep, evs, 256, -1);
		for (int i = 0; i < n; i++) {
			int fd = evs[i].data.fd;
			if (fd == lfd) {
				int c;
				while ((c = accept4(lfd, 0, 0, SOCK_NONBLOCK)) >= 0) {
					setsockopt(c, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
					if (c >= MAX_FDS) { close(c); continue; }
					source[c] = 0;
					ev.events = EPOLLIN, ev.data.fd = c;
					epoll_ctl(ep, EPOLL_CTL_ADD, c, &ev);
				}
				continue;
			}
			if (source[fd]) {
				ssize_t w = send(fd, buf, BUF, MSG_NOSIGNAL);
				if (w < 0 && errno != EAGAIN) close(fd);
				continue;
			}
			ssize_t r = recv(fd, buf, BUF, 0);
			if (r == 0 || (r < 0 && errno != EAGAIN)) { close(fd); continue; }
			if (r < 0) continue;
			if (echo) {
				if (send(fd, buf, r, MSG_NOSIGNAL) != r) close(fd);
			} else if (buf[0] == 'G' && r == 1) {
				source[fd] = 1;
				ev.events = EPOLLOUT, ev.data.fd = fd;
				epoll_ctl(ep, EPOLL_CTL_MOD, fd, &ev);
			}
		}
	}
}

static void ping(int n, int size, double seconds)
{
	static uint64_t sent[MAX_FDS];
	static int got[MAX_FDS];
	size_t cap = 1 << 24, count = 0;
	uint32_t *lat = malloc(cap * sizeof *lat);
	int ep = epoll_create1(0), fds[n];
	struct epoll_event ev, evs[256];
	for (int i = 0; i < n; i++) {
		fds[i] = tunnel();
		ev.events = EPOLLIN, ev.data.fd = fds[i];
		epoll_ctl(ep, EPOLL_CTL_ADD, fds[i], &ev);
	}
	memset(buf, 'x', size);
	double cpu0 = cpu();
	uint64_t t0 = now_ns(), warm = t0 + 200000000ull, end = t0 + seconds * 1e9, t1 = t0;
	for (int i = 0; i < n; i++) { sent[fds[i]] = now_ns(); all(fds[i], 1, buf, size); }
	while (t1 < end) {
		int k = epoll_wait(ep, evs, 256, 1000);
		if (k == 0) { fprintf(stderr, "stalled\n"); exit(1); }
		for (int i = 0; i < k; i++) {
			int fd = evs[i].data.fd;
			ssize_t r = recv(fd, buf, size - got[fd], MSG_DONTWAIT);
			if (r <= 0) { fprintf(stderr, "tunnel broke\n"); exit(1); }
			if ((got[fd] += r) < size) continue;
			got[fd] = 0;
			t1 = now_ns();
			if (t1 > warm && count < cap) lat[count++] = t1 - sent[fd];
			sent[fd] = t1;
			all(fd, 1, buf, size);
		}
	}
	qsort(lat, count, sizeof *lat, by_value);
	printf("{\"rate\": %.1f, \"p50_us\": %.2f, \"p90_us\": %.2f, \"p99_us\": %.2f, \"p999_us\": %.2f, \"cpu\": %.3f}\n",
	       count / ((t1 - warm) / 1e9), lat[count / 2] / 1e3, lat[count * 9 / 10] / 1e3, lat[count * 99 / 100] / 1e3,
	       lat[count * 999 / 1000] / 1e3, cpu() - cpu0);
}

static void bulk(int n, double seconds, int pull)
{
	int ep = epoll_create1(0);
	struct epoll_event ev, evs[64];
	uint64_t total = 0;
	for (int i = 0; i < n; i++) {
		int fd = tunnel();
		all(fd, 1, pull ? "G" : "PP", pull ? 1 : 2);
		ev.events = pull ? EPOLLIN : EPOLLOUT, ev.data.fd = fd;
		epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev);
	}
	double cpu0 = cpu();
	uint64_t t0 = now_ns(), end = t0 + seconds * 1e9, t1 = t0;
	memset(buf, 'P', BUF);
	while (t1 < end) {
		int k = epoll_wait(ep, evs, 64, 1000);
		for (int i = 0; i < k; i++) {
			int fd = evs[i].data.fd;
			ssize_t r = pull ? recv(fd, buf, BUF, MSG_DONTWAIT) : send(fd, buf, BUF, MSG_DONTWAIT | MSG_NOSIGNAL);
			if (r < 0 && errno == EAGAIN) continue;
			if (r <= 0) { fprintf(stderr, "tunnel broke\n"); exit(1); }
			total += r;
		}
		t1 = now_ns();
	}
	printf("{\"bytes\": %llu, \"seconds\": %.4f, \"gbit\": %.4f, \"cpu\": %.3f}\n", (unsigned long long)total,
	       (t1 - t0) / 1e9, total * 8.0 / (t1 - t0), cpu() - cpu0);
}

static double dial_seconds;

static void *dialler(void *counter)
{
	uint64_t end = now_ns() + dial_seconds * 1e9;
	long *count = counter;
	char byte = 'x';
	while (now_ns() < end) {
		int fd = tunnel();
		all(fd, 1, &byte, 1);
		all(fd, 0, &byte, 1);
		close(fd);
		++*count;
	}
	return 0;
}

static void dial(int n, double seconds)
{
	pthread_t threads[n];
	long counts[n], total = 0;
	uint64_t t0 = now_ns();
	dial_seconds = seconds;
	memset(counts, 0, sizeof counts);
	for (int i = 0; i < n; i++)
		if (pthread_create(&threads[i], 0, dialler, &counts[i])) die("pthread_create");
	for (int i = 0; i < n; i++) {
		pthread_join(threads[i], 0);
		total += counts[i];
	}
	printf("{\"connections\": %ld, \"rate\": %.1f}\n", total, total / ((now_ns() - t0) / 1e9));
}

static void hold(int n)
{
	for (int i = 0; i < n; i++) {
		int fd = tunnel();
		all(fd, 1, "x", 1);
		all(fd, 0, buf, 1);
	}
	printf("ready\n");
	fflush(stdout);
	while (getchar() != EOF) {}
}

int main(int argc, char **argv)
{
	if (argc < 3) { fprintf(stderr, "usage: see the head of bench/load.c\n"); return 2; }
	const char *mode = argv[1];
	if (!strcmp(mode, "echo") || !strcmp(mode, "sink")) { serve(atoi(argv[2]), mode[0] == 'e'); return 0; }
	proxy = parse(argv[2]);
	int last = !strcmp(mode, "ping") ? 6 : !strcmp(mode, "hold") ? 4 : 5;
	if (argc > last) { target = parse(argv[last]); have_target = 1; }
	if (argc < last) { fprintf(stderr, "usage: see the head of bench/load.c\n"); return 2; }
	int n = atoi(argv[3]);
	if (!strcmp(mode, "ping")) ping(n, atoi(argv[4]), atof(argv[5]));
	else if (!strcmp(mode, "pull") || !strcmp(mode, "push")) bulk(n, atof(argv[4]), mode[2] == 'l');
	else if (!strcmp(mode, "hold")) hold(n);
	else if (!strcmp(mode, "dial")) dial(n, atof(argv[4]));
	else return 2;
	return 0;
}
