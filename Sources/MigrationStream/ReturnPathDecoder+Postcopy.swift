// What a destination wants of a source whose guest it runs.

extension ReturnPathDecoder {
    /// - Returns: nil when bytes are missing.
    mutating func postcopyMessage(
        _ type: ReturnPathType, _ length: Int, _ buffer: inout ReceiveBuffer
    ) throws(StreamError) -> PostcopyMessage? {
        switch type {
        case .requestPages:
            guard length == 12 else { throw wrong(length, type) }
            guard let requestedBlock else { throw error(.postcopy(.requestWithoutBlock)) }
            let request = try request(of: requestedBlock, buffer)
            advance(4 + length, in: &buffer)
            return .requestPages(request)
        case .requestPagesWithName:
            guard length >= 14, length == 13 + Int(buffer[16]) else { throw wrong(length, type) }
            let block = try known(buffer, at: 17, count: length - 13)
            let request = try request(of: block, buffer)
            requestedBlock = block
            advance(4 + length, in: &buffer)
            return .requestPages(request)
        case .receivedBitmap:
            guard length >= 2, length == 1 + Int(buffer[4]) else { throw wrong(length, type) }
            guard buffer.count >= 4 + length + 8 else { return nil }
            let block = try known(buffer, at: 5, count: length - 1)
            let byteCount = buffer.be64(4 + length)
            let expected = ReceivedBitmap.byteCount(of: blocks[block])
            guard byteCount == expected else {
                throw error(.postcopy(.bitmapLength(block: blocks[block].name, got: byteCount, expected: expected)))
            }
            advance(4 + length + 8, in: &buffer)
            payloadBytes = Int(byteCount)
            bitmapBlock = block
            return .receivedBitmap(block: blocks[block].name, byteCount: byteCount)
        case .resumeAcknowledged:
            guard length == 4 else { throw wrong(length, type) }
            guard buffer.be32(4) == Self.resumeValue else {
                throw error(.postcopy(.resumeAcknowledgement(buffer.be32(4))))
            }
            advance(4 + length, in: &buffer)
            return .resumeAcknowledged
        default: throw error(.unsupportedMessage(type.name))
        }
    }

    static let resumeValue: UInt32 = 1

    /// The mark behind a bitmap. - Returns: nil when bytes are missing.
    mutating func bitmapEnd(_ block: Int, _ buffer: inout ReceiveBuffer) throws(StreamError) -> PostcopyMessage? {
        guard buffer.count >= 8 else { return nil }
        guard buffer.be64(0) == ReceivedBitmap.endMark else {
            throw error(.postcopy(.bitmapEnd(block: blocks[block].name, buffer.be64(0))))
        }
        advance(8, in: &buffer)
        bitmapBlock = nil
        return .bitmapEnded(block: blocks[block].name)
    }

    private func request(of index: Int, _ buffer: ReceiveBuffer) throws(StreamError) -> PageRequest {
        let block = blocks[index]
        let request = PageRequest(block: block.name, offset: buffer.be64(4), length: buffer.be32(12))
        if let fault = block.fault(of: request.offset, UInt64(request.length)) { throw error(.postcopy(fault)) }
        guard request.length <= StreamLimit.requestBytes else {
            throw error(.postcopy(.requestTooLong(block: block.name, offset: request.offset, length: request.length)))
        }
        return request
    }

    private func known(_ buffer: ReceiveBuffer, at index: Int, count: Int) throws(StreamError) -> Int {
        for block in blockNames.indices
        where blockNames[block].count == count && buffer.holds(blockNames[block], at: index) {
            return block
        }
        guard let name = buffer.text(index..<(index + count)) else { throw error(.nameNotText(what: "a RAM block")) }
        throw error(.unknownBlock(name: name))
    }

    private func wrong(_ length: Int, _ type: ReturnPathType) -> StreamError {
        error(.messageLength(type.name, got: length))
    }
}
