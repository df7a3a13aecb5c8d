// Sections of unknown layout, only for describing a stream: their end is the footer with their id, followed by something
// that can begin the next section.

extension StreamDecoder {
    private static var limit: Int { 4 * StreamLimit.sectionBodyBytes }

    mutating func inference(_ buffer: inout ReceiveBuffer) throws(StreamError) -> Step {
        guard let head = inferredHead else { preconditionFailure("StreamDecoder: inference without a section") }
        var index = 0
        while index < buffer.count {
            guard inferredBytes + UInt64(index) <= UInt64(Self.limit) else {
                throw error(.footerNotFound(section: head.name, limit: Self.limit))
            }
            if buffer[index] == SectionType.footer.rawValue {
                switch footer(of: head.id, at: index, in: buffer) {
                case .some(true):
                    let item = StreamItem.inferredSection(
                        head, type: sectionType, bodyBytes: inferredBytes + UInt64(index))
                    advance(index + 5, in: &buffer)
                    inferredHead = nil
                    state = .betweenSections
                    return .item(item)
                case .some(false): break
                case .none:
                    skip(index, in: &buffer)
                    return .needMore
                }
            }
            index += 1
        }
        skip(index, in: &buffer)
        return .needMore
    }

    private mutating func skip(_ count: Int, in buffer: inout ReceiveBuffer) {
        inferredBytes += UInt64(count)
        advance(count, in: &buffer)
    }

    /// Whether the footer of that section stands at `index`; nil when more bytes are needed to say.
    private func footer(of id: UInt32, at index: Int, in buffer: ReceiveBuffer) -> Bool? {
        guard buffer.count >= index + 5 else { return inputHasEnded ? false : nil }
        guard buffer.be32(index + 1) == id else { return false }
        guard buffer.count > index + 5 else { return inputHasEnded ? true : nil }
        return sectionBegins(at: index + 5, in: buffer)
    }

    private func sectionBegins(at index: Int, in buffer: ReceiveBuffer) -> Bool? {
        let unknown: Bool? = inputHasEnded ? false : nil
        let available = buffer.count - index
        switch SectionType(rawValue: buffer[index]) {
        case .endOfStream:
            if available == 1 { return inputHasEnded ? true : nil }
            return buffer[index + 1] == SectionType.vmDescription.rawValue
        case .start, .full:
            guard available >= 6 else { return unknown }
            let length = Int(buffer[index + 5])
            guard length > 0, sections[buffer.be32(index + 1)] == nil else { return false }
            guard available >= 14 + length else { return unknown }
            return (0..<length).allSatisfy { (0x20..<0x7f).contains(buffer[index + 6 + $0]) }
        case .part, .end:
            guard available >= 5 else { return unknown }
            return sections[buffer.be32(index + 1)].map { !$0.ended } ?? false
        case .command:
            guard available >= 5 else { return unknown }
            return CommandType(rawValue: buffer.be16(index + 1)) ?? .invalid != .invalid
        default: return false
        }
    }
}
