/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * The witness: says what would be decided for a SYN, over the very maps and by the very verdict() that the hooks use. It is
 * attached nowhere; who wants to know runs it by BPF_PROG_TEST_RUN (rama_ebpf/kernel/witness.py). Nothing is counted, charged
 * or told to those who watch.
 *
 * Each run answers the next question of the batch that it is given as a packet, so one system call with `repeat` answers all.
 * Between two instructions another witness may come in on this CPU and use the same scratch: the nonce that was put into it
 * shows that.
 */

/* An index as the verifier believes it: the empty asm keeps clang from taking the mask away. */
#define WITHIN(index)                                \
	({                                           \
		u64 index_ = index;                  \
		asm volatile("" : "+r"(index_));     \
		index_ & (MAX_QUESTIONS - 1);        \
	})

int witness(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct testimony_head *head = data;
	struct question *question;
	struct testimony *testimony;
	struct scratch *s;
	u64 index, at;

	if ((void *)(head + 1) > end)
		return 0;
	index = head->next;
	if (index >= MAX_QUESTIONS)
		return 0;
	index = WITHIN(index);
	question = data + sizeof(*head) + index * sizeof(*question);
	if ((void *)(question + 1) > end)
		return 0;
	s = begin_in(SCRATCH_WITNESS);
	if (!s)
		return 0;
	/* In members that only XDP's answers use. The nonce first: whoever comes in after this leaves another one. */
	s->answer.sequence = question->nonce;
	s->size = index;
	barrier();
	s->packet.source = question->source;
	s->packet.target = question->target;
	s->packet.port = question->port;
	s->packet.syn = 1;
	s->packet.ipv4 = is_mapped(&s->packet.source);
	__builtin_memset(&s->loaded, 0, sizeof(s->loaded));
	__builtin_memset(&s->runtime, 0, sizeof(s->runtime));
	s->answer.acknowledgement = !find_listener(&s->packet, &s->listener, &s->wildcard) ? TESTIMONY_NO_LISTENER :
				    s->listener.state == LISTENER_OPEN ? TESTIMONY_OPEN : TESTIMONY_CLOSED;
	verdict(s, CHARGE_NONE);

	barrier();
	at = WITHIN(s->size);
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	head = data;
	if ((void *)(head + 1) > end)
		return 0;
	testimony = data + sizeof(*head) + at * sizeof(*testimony);
	if ((void *)(testimony + 1) > end)
		return 0;
	head->next = at + 1;
	testimony->listener = s->answer.acknowledgement;
	testimony->verdict = s->verdict;
	testimony->loaded_rank = s->loaded.rank;
	testimony->loaded_rule = s->loaded.rule;
	testimony->runtime_rank = s->runtime.rank;
	testimony->runtime_rule = s->runtime.rule;
	testimony->nonce = s->answer.sequence;
	return 0;
}
